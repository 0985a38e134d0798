"""Other frameworks: their protocols around what detguard has, and what is theirs as detguard takes it."""
