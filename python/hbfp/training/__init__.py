"""Training real networks on real data: what `hbfp demo` and `hbfp train` run.

`data`, `gpt`, `resnet` and `digits` are plain torch; `loop` adds the recipe, the schedule and checkpoints; `train`,
`demo`, `progress` and `report` are what the command line shows of it. Needs torch; `demo` also scikit-learn and
matplotlib.
"""
