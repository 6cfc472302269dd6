"""Training real networks on real data: what `hbfp demo` and `hbfp train` run.

`data`, `cifar` and `images`, and the networks `gpt`, `resnet`, `bottleneck`, `densenet` and `digits` are plain torch;
`plan` and `loop` add recipe, schedule and checkpoints; `train`, `demo`, `progress`, `outcome`, `report` and `scalars`
are what the command line shows of it. Needs torch; `demo` also scikit-learn and matplotlib, `scalars` tensorboard.
"""
