"""Words that users choose among. It imports nothing: command lines are checked before torch is imported."""

AUTO = "auto"
COMBINE_ON = ("probs", "logits", "raw_logits")
COUPLINGS = (AUTO, "ancestral", "gumbel", "maximal")
DEFAULT_COMBINE_ON = {"weighted": "probs", "product": "raw_logits", "contrastive": "raw_logits"}
METHODS = tuple(DEFAULT_COMBINE_ON)
PROMPT_LOOKUP = "prompt_lookup"
NO_DRAFTER = "none"  # of command lines alone
DRAFTERS = (AUTO, PROMPT_LOOKUP, NO_DRAFTER)
EMBEDDED = ("reader", "solver", "draft")  # models in the package
