"""SD1.5 in miniature: icons of every kind in many styles, and each model of the real chain, small, in its real layout."""
