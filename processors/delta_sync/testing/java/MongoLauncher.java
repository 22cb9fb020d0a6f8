import de.bwaldvogel.mongo.MongoServer;
import de.bwaldvogel.mongo.MongoVersion;
import de.bwaldvogel.mongo.backend.h2.H2Backend;
import de.bwaldvogel.mongo.bson.Document;
import de.bwaldvogel.mongo.wire.message.MongoMessage;
import io.netty.channel.Channel;
import java.util.List;
import java.util.concurrent.CountDownLatch;
import org.h2.mvstore.MVStore;

/** MongoDB's wire protocol on 127.0.0.1. Arguments: port, data file. */
public class MongoLauncher {
    /**
     * H2 writes once a second by itself, which would lose acknowledged writes when the server is killed. And one
     * command at a time: two that delete the same documents fail here ("No document with key"), which MongoDB's do not.
     * And everything stays in the cache: what H2 reads from the file again is no longer found by an _id that is a
     * document, as these are compared by their serialized bytes, which differ by where such an object comes from.
     */
    static class DurableBackend extends H2Backend {
        static final int CACHE_MB = 512;

        DurableBackend(String file) {
            super(new MVStore.Builder().fileName(file).cacheSize(CACHE_MB).open());
        }

        @Override
        public synchronized Document handleMessage(MongoMessage message) {
            Document reply = super.handleMessage(message);
            commit();
            return reply;
        }

        @Override
        public synchronized Document handleCommand(Channel channel, String database, String command, Document query) {
            Document reply = super.handleCommand(channel, database, command, query);
            commit();
            return reply;
        }
    }

    /** Drivers of today refuse the wire version 8 that the stand-in reports by itself. */
    static class Version44 implements MongoVersion {
        @Override
        public List<Integer> getVersionArray() {
            return List.of(4, 4, 0);
        }

        @Override
        public int getWireVersion() {
            return 9;
        }

        @Override
        public String toVersionString() {
            return "4.4.0";
        }
    }

    public static void main(String[] args) throws Exception {
        DurableBackend backend = new DurableBackend(args[1]);
        backend.version(new Version44());
        MongoServer server = new MongoServer(backend);
        server.bind("127.0.0.1", Integer.parseInt(args[0]));
        Runtime.getRuntime().addShutdownHook(new Thread(server::shutdownNow));
        new CountDownLatch(1).await();
    }
}
