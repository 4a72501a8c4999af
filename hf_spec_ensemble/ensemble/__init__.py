"""What is decoded: the members' distributions combined, and what may change them. Pure functions of tensors;
never runs a model, and does not depend on caches or schedules."""
