"""An alias: `hf_spec_ensemble.tools.harness`, under the name that is documented."""

from .tools.harness import SpecEnsembleLM, main


__all__ = ["SpecEnsembleLM", "main"]

if __name__ == "__main__":
    main()
