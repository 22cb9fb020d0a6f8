"""Handlers of events that Delta brings: `webhook.Webhook` and `topic.Topic`, for `@pipeline.on(…)`.

movies.on("public.movie", name="shop", batch=100)(Webhook("https://shop.example/changes", secret="${env:HOOK_SECRET}"))
"""
