"""The report as a page, `report.html`: its content, and the template, style and script that show it."""
