"""The parts of a program, one dimension or a few that belong together in each file."""
