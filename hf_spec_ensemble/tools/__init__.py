"""The command line, the evaluation harness, and what programs share.
Never used by anything below: it only calls what the package offers."""
