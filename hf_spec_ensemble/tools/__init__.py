"""The command line, the evaluation harness, and what programs share.
Not imported by the modules below: it only uses the public interface."""
