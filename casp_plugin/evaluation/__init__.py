"""How good a checkpoint is: on text, on questions about images, on tasks of lm-eval and lmms-eval,
with intervals, and against another checkpoint on the same documents."""
