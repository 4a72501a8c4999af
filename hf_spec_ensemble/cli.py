"""An alias: `hf_spec_ensemble.tools.cli`, under the name that is documented."""

from .tools.cli import main


__all__ = ["main"]

if __name__ == "__main__":
    main()
