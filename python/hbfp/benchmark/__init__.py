"""`hbfp bench`: products, encoders and training steps against torch, torchao and ggml, beside what the machine can do.

`suite` runs the `cases`; each checks its contestants' answers (`checks`), times them in turn (`timing`) and gives rows
(`results`). The contestants that are not ours are in `peers` and `ggml`; `ceilings` measures the machine; `gates` is
the table of ratios to reach; `report` and `plot` show it all.
"""

CASES = (
    "ceilings",
    "packed",
    "forward",
    "few-rows",
    "cold-row",
    "batched",
    "encode",
    "training",
    "scaling",
    "overhead",
    "layers",
    "inference",
    "sweep",
)
"""What can be asked for one by one. Here because this file imports nothing: the rest needs torch."""
