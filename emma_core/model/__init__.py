"""The papers: the connector of ELLA, the gated blocks of EMMA, and how modules are added up."""
