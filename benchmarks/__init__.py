"""Programs that measure Prunus by its public API, in folders by what they ask; see README.md."""
