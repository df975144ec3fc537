"""Training EMMA modules and ELLA connectors: data, caches, loop, reports."""
