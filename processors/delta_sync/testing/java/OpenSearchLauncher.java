import java.io.IOException;
import java.util.concurrent.CountDownLatch;
import org.codelibs.opensearch.runner.OpenSearchRunner;

/** OpenSearch, one node over HTTP on 127.0.0.1. Arguments: base path, port (the transport is on the next one). */
public class OpenSearchLauncher {
    static void close(OpenSearchRunner runner) {
        try {
            runner.close();
        } catch (IOException e) {
            throw new java.io.UncheckedIOException(e);
        }
    }

    public static void main(String[] args) throws Exception {
        int port = Integer.parseInt(args[1]);
        OpenSearchRunner runner = new OpenSearchRunner();
        runner.onBuild((number, settings) -> {
            settings.put("network.host", "127.0.0.1");
            settings.put("http.port", port);
            settings.put("transport.port", port + 1);
            // A test machine's disk may be nearly full, which must not turn indices read-only.
            settings.put("cluster.routing.allocation.disk.threshold_enabled", false);
        });
        runner.build(OpenSearchRunner.newConfigs()
                .clusterName("delta-testing").numOfNode(1).basePath(args[0]).disableESLogger());
        Runtime.getRuntime().addShutdownHook(new Thread(() -> close(runner)));
        new CountDownLatch(1).await();
    }
}
