"""Everyday words that no emoji is called, and the nearest of what the world can draw; a notice names it."""

SYNONYMS = {
    "king": "prince", "queen": "princess", "knight": "guard", "warrior": "guard", "waiter": "cook", "waitress": "cook",
    "baker": "cook", "engineer": "mechanic", "driver": "pilot", "captain": "pilot",
    "policeman": "man police officer", "policewoman": "woman police officer", "firewoman": "woman firefighter",
    "kid": "child", "human": "person", "grandma": "old woman", "grandpa": "old man", "her": "woman", "his": "man",
    "she": "woman", "he": "man", "sofa": "couch and lamp", "pumpkin": "jack o lantern", "dinosaur": "t rex",
    "smartphone": "mobile phone", "animal": "nature", "forest": "evergreen tree", "sea": "water wave", "river": "water wave",
    "lake": "water wave", "street": "motorway", "road": "motorway", "village": "house with garden", "pants": "jeans",
    "grass": "herb",
}
