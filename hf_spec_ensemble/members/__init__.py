"""How one model runs: its passes, caches and roll-back; compiled, spread, with an adapter; what passes cost.
Never decides who runs next, and never draws or verifies a token."""
