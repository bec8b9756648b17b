"""The screens of the page; each module's `add` registers its screen and its routes."""
