"""The command line, the evaluation harness, and what programs share.
Never imported by the modules below: it only uses the public interface."""
