"""What a search comes to: the certificate and its ledger, quality gates, the exported artifact, report and pictures."""
