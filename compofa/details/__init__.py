"""What a network said of each image of a part: tables, pictures and a page of examples."""
