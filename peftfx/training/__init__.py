"""Programs in training loops, our own and other people's.

`callback` has what all trainers share, `trainer` and `lightning` the two that are supported,
`state` and `partial` their checkpoints, `fit` the loop for scripts, `pretrained` the program as a
`PreTrainedModel`.
"""
