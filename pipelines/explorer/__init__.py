"""The explorer in the browser: what its tabs show, as plain functions, and the page, which alone knows gradio."""
