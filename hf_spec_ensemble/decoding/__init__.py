"""The loop: proposals, verification, output; speculative and standard; and the checks of a call.
Never touches the inside of a model or a cache, and never loads anything but tokenizers to compare."""
