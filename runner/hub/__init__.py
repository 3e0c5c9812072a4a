"""The Hugging Face hub: its cache on this machine, and what is fetched from it by processes of our own.

`client`, `listing`, `transfer`, `fetch` and `ask` run in those processes and import the hub's library, which takes
100 ms; nothing else does.
"""
