"""Models, data and commands that tests of several rooms share."""
