FROM base
COPY --from=files x /x
