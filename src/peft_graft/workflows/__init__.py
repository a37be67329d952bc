"""Run the jobs on files, one a module: the verbs of the command line, as functions of the same names."""
