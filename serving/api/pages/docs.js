// The page of the API's document. Nothing is asked of another origin: there is no validator badge.
"use strict";

SwaggerUIBundle({
  url: new URL("../api-doc/openapi.json", document.baseURI).href,
  dom_id: "#docs",
  deepLinking: true,
  defaultModelsExpandDepth: 0,
  displayRequestDuration: true,
  filter: false,
  tryItOutEnabled: true,
  validatorUrl: null,
});
