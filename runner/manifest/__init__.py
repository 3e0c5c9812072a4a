"""What the user wants: the manifest, read and checked.

`load.load_manifest` gives a valid manifest, or every diagnostic at once; `report.render_diagnostics` prints those.
Nothing is imported here: who prints diagnostics does not want to pay for pydantic.
"""
