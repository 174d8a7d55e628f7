"""The HTML page of a report: its sections as data, its charts as SVG, and the template page.html."""
