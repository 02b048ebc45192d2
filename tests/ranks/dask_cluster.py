"""Gradients as dask arrays on a LocalCluster of two worker processes. tests/test_dask_cluster.py runs it."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main() -> None:
    import dask
    import dask.array as da
    import numpy as np
    from distributed import Client, LocalCluster

    import exact
    import gradclip

    rng = np.random.default_rng(0)
    host = {
        "w": rng.standard_normal((400, 30)).astype(np.float32),
        "b": np.float32([3e25, -4e25, 0]),
        "h": rng.standard_normal(50),
    }
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        graphs = []
        submit = client.get

        def counted(*args: Any, **kw: Any) -> Any:
            graphs.append(args)
            return submit(*args, **kw)

        client.get = counted

        tree = {key: da.from_array(x, chunks=100 if x.ndim == 1 else (100, 30)) for key, x in host.items()}
        out = gradclip.clip_grad_norm(tree, 1.0)
        assert all(isinstance(x, da.Array) for x in [*out.grads.values(), out.norm])
        assert {key: x.chunks for key, x in out.grads.items()} == {key: x.chunks for key, x in tree.items()}
        assert graphs == []
        print("lazy: no task ran before compute")

        grads, norm = dask.compute(out.grads, out.norm)
        assert len(graphs) == 1, len(graphs)
        want = exact.norm(host.values())
        exact.check_norm(norm, want, "float64")
        for key, x in host.items():
            assert grads[key].dtype == x.dtype
            np.testing.assert_allclose(grads[key], x * float(1 / want), rtol=1e-6, atol=1e-44)
        workers = {worker for holders in client.who_has().values() for worker in holders}
        assert len(client.scheduler_info()["workers"]) == 2, workers
        print(f"one compute, one graph: norm and {len(grads)} leaves")

        for bad in (math.nan, math.inf):
            tree["h"] = da.from_array(np.array([1.0, bad]), chunks=1)
            zero, nan = (gradclip.clip_grad_norm(tree, 1.0, nonfinite=policy).grads for policy in ("zero", "propagate"))
            zero, nan = dask.compute(zero, nan)
            assert not any(x.any() for x in zero.values())
            assert all(np.isnan(x).all() for x in nan.values())
        print("policies: so")


if __name__ == "__main__":  # the workers import this file
    main()
