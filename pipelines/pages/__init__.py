"""What a person is shown of these figures: tables, plots, words, the page."""
