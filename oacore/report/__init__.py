"""What reports and figures are made of: numbers, parts, cells, page, SVG."""
