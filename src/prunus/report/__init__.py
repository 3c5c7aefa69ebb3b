"""What a person sees: counts, tables, pictures, JSON; every print of Prunus lives here."""
