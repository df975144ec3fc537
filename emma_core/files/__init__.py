"""Files of modules and connectors, read strictly and written whole."""
