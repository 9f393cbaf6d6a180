"""A task that nobody needs: the mean colour of an image.

It is added as `CONTRIBUTING.md` says, and shows that nothing but its own files and its entry in the
list of tasks has to know of it.
"""
