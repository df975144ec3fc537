"""A small real data set: emoji of people, drawn by four vendors (style) in five skin tones (face), with captions."""
