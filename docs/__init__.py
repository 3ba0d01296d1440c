"""Tables and pictures of README.md and docs/*.md, made from results, options and profiles: `python -m docs`."""
