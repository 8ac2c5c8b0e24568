"""Files in, samples out: reading, checking, chat templates, masks, mixing and the order of the data.

Nothing here loads torch, transformers or ray: the service checks uploads with it, and the token
half needs only the `tokenizers` package and jinja2.
"""
