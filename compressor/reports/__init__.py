"""Reports: `report.py` is the schema, the others are its forms for people."""
