"""A log of norms that training does not wait for, and the pictures of it.

>>> import tempfile, numpy as np, gradclip
>>> path = tempfile.mkdtemp() + "/norms.csv"
>>> grads = {"w": np.array([3.0, 4.0]), "b": np.array([0.5])}
>>> with NormLog(path) as log:
...     for step in range(3):
...         clipped, norm = gradclip.clip_grad_norm(grads, 1.0)
...         log.add(step, norm, max_norm=1.0, per_leaf=gradclip.norms(grads))
>>> read(path)["grads['w']"]
array([5., 5., 5.])

``python -m gradclip.monitor norms.csv -o norms.png`` draws it, and prints what other bounds would have clipped. Only
the picture needs matplotlib. docs/monitor.md shows a training loop in each library.
"""

from __future__ import annotations

from gradclip.monitor._log import NormLog
from gradclip.monitor._read import read

__all__ = ["NormLog", "read"]
