"""Programs in training loops, our own and other people's.

`callback` has what all trainers share, `trainer` and `lightning` the two that are supported,
`state` and `partial` their checkpoints, `pretrained` the program as a `PreTrainedModel`. `fit` is
the loop for scripts: `loop` has its steps, `stream` its batches, `held_out` its evaluations,
`reports` its bar and loggers, `resuming` its checkpoints.
"""
