"""What a study says: certificate, gates, export, report, plots."""
