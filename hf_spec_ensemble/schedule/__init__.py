"""Who runs next, who proposes, and what that is worth, from counts, costs and acceptance.
Never sees a token of the texts, and never runs a model."""
