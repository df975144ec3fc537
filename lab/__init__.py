"""How the small worlds are made and judged: data, training of bases, classifiers, claims. Not part of what users install."""
