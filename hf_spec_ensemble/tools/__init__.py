"""The command line and the evaluation harness, and what programs share. Only calls what the package offers: nothing below
imports anything from here."""
