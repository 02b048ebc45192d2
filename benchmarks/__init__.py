"""What clipping costs, beside the floor that memory sets and beside what a person would use instead.

    python -m benchmarks --short

`timing` is the instrument, `trees` what is clipped, `targets` what is to be reached. Each of `on_numpy`, `narrow`,
`on_jax`, `training_step`, `on_devices`, `on_gpu`, `growth`, `threads`, `memory` and `accuracy` measures one subject and
returns `results`; `report` prints and writes those, `chart` draws them.
"""
