"""Pictures about pictures: contact sheets, gate maps, thumbnails."""
