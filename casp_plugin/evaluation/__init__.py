"""The quality of a checkpoint: on text, on questions about images, on tasks of lm-eval and
lmms-eval; with 95 % intervals, and against another checkpoint on the same documents."""
