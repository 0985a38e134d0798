"""Image transforms, one small file per kind, each with the rule for its gradient."""
